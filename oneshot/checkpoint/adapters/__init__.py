"""Low-rank updates and the PEFT adapters that hold them, of fused experts too."""
