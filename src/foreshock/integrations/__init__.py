"""A watch inside the training frameworks: one module each, which imports its framework and is imported by nothing else."""
