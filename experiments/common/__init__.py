"""What the studies share: settings, command line, resumable rows, recipes and the report."""
