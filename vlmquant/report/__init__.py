"""Reports: one Report of data, shown as a table, Markdown and HTML."""
