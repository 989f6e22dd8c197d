"""Published model families: each module registers what `sparsejax.io.family.Family` asks for."""
