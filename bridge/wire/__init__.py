"""How it travels: torch.distributed, and the kernel's own copy between two processes of one host."""
