"""What every part uses and nothing else of the project is needed for: errors, ranks, files."""
