"""What is shown of one run, or of one model before and after an edit: report, terminal tables, pictures."""
