"""The tests: a tree like that of the sources. Imported by whole names, from the root."""
