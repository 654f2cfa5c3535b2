"""The only importer of `kubernetes`: a small port in plain dicts, its real and its in-memory implementation."""
