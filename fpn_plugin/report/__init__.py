"""What the reports share: tables, pages, figures, progress bars."""
