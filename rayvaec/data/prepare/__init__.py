"""From AnnData files to a store: validate, select genes, shuffle, write, append."""
