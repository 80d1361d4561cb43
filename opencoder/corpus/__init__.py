"""From raw files to clean documents: read, language, dedup, signals and rules, report."""
