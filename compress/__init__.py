"""Training of the small demo model that ships with the project."""
