"""How the bytes of a cache are read, written, published and locked."""
