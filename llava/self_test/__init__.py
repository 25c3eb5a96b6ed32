"""Checks of `llava doctor --self-test`: tiny models on the device, against float32 on the CPU."""
