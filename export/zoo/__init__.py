"""Own network definitions, one readable file per family."""
