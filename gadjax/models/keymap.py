"""Key maps: parameter paths to the keys of diffusers and transformers weight files."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Original:
    """Module of an original release, as modules of diffusers.

    Attributes:
      modules: names in diffusers, in the order of their rows (outputs) in the original's weight.
      swapped: the two halves of its rows are in the other order there.
    """

    modules: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True)
class KeyMap:
    """Mapping of a network's parameter paths to the keys of its weight file.

    Attributes:
      renames: regex substitutions, in order, on the '/'-joined path; '#' in the result stands for
        the layer index, and marks a leaf whose leading axis is the layer. '#+13' counts from 13
        on, for a stack of layers behind another one.
      ignored: regexes of file keys that are derived: skipped when reading, never written.
      aliases: regex substitutions from older spellings of a file key to the current one.
      tied_keys: (key, other key) of tied tensors, which files store once or twice; the other key
        is written.
    """

    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    tied_keys: tuple[tuple[str, str], ...] = ()

    def key(self, path: str) -> str:
        """Key in the file for the parameter at `path`."""
        for pattern, replacement in self.renames:
            path = re.sub(pattern, replacement, path)
        *parents, last = path.split("/")
        last = "weight" if last in ("kernel", "scale", "embedding") else last
        return ".".join([*parents, last])

    def canonical(self, key: str) -> str:
        """Current spelling of a file's key: without aliases, and the written one of tied keys."""
        for pattern, replacement in self.aliases:
            key = re.sub(pattern, replacement, key)
        return dict(self.tied_keys).get(key, key)
