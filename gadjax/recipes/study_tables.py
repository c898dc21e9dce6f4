def write_tables(out, cells, families):
    pass
