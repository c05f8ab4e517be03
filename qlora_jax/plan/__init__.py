"""What a run needs: bytes in closed form (`ledger`), bytes of the compiled step (`accounts`)."""
