"""Rows of results -> files: tables, figures, one HTML page, the papers' values beside ours."""
