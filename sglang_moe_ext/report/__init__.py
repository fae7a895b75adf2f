"""A report of a tuning run or of a table: figures, one page, and the text of a pull request."""
