"""The report of a run: `result.json`, `report.md` and its figures."""
