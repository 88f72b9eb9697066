"""Which language models were tested as decoders of packs: small random ones, check by check."""
