"""The script that `specvlm slurm` prints, by itself and on a real Slurm."""
