"""Everything we know about the engines: each name, path, signature and habit of theirs stands here and nowhere else."""
