"""Facts about each GPU, its names, and what follows from them: a roofline, shared memory, memory."""
