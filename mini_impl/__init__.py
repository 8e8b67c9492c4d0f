"""The package of the book: every loss and model that its chapters derive, one file a chapter."""
