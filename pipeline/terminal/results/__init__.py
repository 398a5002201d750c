"""What commands did, on stdout: the records that they return → lines, tables, or JSON."""
