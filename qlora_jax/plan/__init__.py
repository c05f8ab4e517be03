"""Says what a run needs: by counting shapes (`ledger`), or by compiling its step (`compiled_memory`)."""
