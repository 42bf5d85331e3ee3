"""What a measurement shows and leaves behind: estimates, tables, drawings, files."""
