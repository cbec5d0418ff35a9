"""Data sets as their authors publish them: files in, documents out."""
