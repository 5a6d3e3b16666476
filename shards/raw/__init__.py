"""How data sets lie on disk before they are packed: folders, archives, LMDB, lists of captions."""
