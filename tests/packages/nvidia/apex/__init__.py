"""The calls of NVIDIA's apex that megalite makes, with the signatures that it publishes
(github.com/NVIDIA/apex, 2026): any other argument fails. Computed by torch, so it needs no GPU."""
