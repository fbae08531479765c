"""The report of posterior predictive checks: page, plots, report.json."""
