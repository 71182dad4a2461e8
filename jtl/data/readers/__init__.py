"""Files to examples: one reader a kind of data, of your own files and of public sets."""
