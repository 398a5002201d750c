"""Where the bytes of a cache lie: a Zarr v3 folder or one HDF5 file."""
