"""Other libraries' ways to choose an attention: one file each, nothing is imported from here."""
