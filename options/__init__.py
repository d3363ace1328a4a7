"""Options: from files and the command line to small frozen dataclasses, and what is said when that fails.

A section is a frozen dataclass in the room that reads it; a field is `name: type = option(default, "help")`
and what else is to be said of it (common, resumable, secret, stages, names elsewhere); checks of one section
stand in its __post_init__ and raise UserError. A program names its sections:

    config = config.load(argv, [ModelOptions, LoraOptions], program="train.py", description="Train.")
    config[LoraOptions] -> the section; config.values, config.origins: key -> value, where it was given

option.py   option(...) at a field; Option, what it says; declared(sections) -> name: Option
config.py   load: files and words -> values of known keys -> sections; Config
values.py   text -> typed values: int, float, bool, str, Literal, tuple, unions of them and None
json_fields.py  what keys of other programs' JSON files (config.json) may hold: kinds and ranges
json_reader.py  every JSON file: one behaviour
launchers.py  DeepSpeed's files, accelerate's environment, the trainer's fsdp -> keys of parallel
aliases.py  keys of other systems: converted, harmless, not built yet
rules.py    Rules between two sections
help.py     what --help prints
errors.py   UserError, StopRun, exit_status; what is said when memory or the output ends
limits.py   bounds for what others wrote: time, memory, paths; the free memory of the host
atomic.py   files that are complete or absent: atomic_file, atomic_folder; locked: a place in a cache
progress.py  how far a long piece of work is: Bar

To add an option: a field in its section, nothing else. A new section: add it to the program's SECTIONS. A
rule between sections: a line in rules.RULES. Nothing here imports another room or torch.
"""
