"""What the reports share: tables, pages, pictures, progress bars."""
