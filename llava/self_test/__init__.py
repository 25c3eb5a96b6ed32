"""The checks of `llava doctor --self-test`: tiny models on the user's device, against float32 on the CPU."""
