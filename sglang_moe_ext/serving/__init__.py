"""The serving wing: what runs inside an engine. It loads no tuning module, and nothing heavy before the engine has."""
