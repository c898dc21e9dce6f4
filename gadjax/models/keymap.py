"""How a parameter's path spells as a key of a file."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class KeyMap:
    """How a parameter's path spells as a key of the diffusers file.

    renames: regex substitutions, in order, on the '/'-joined path; '#' in the result stands for
      the layer index, and marks a leaf whose leading axis is the layer. '#+13' counts from 13 on,
      for a stack of layers behind another one.
    ignored: regexes of file keys that are derived and read past; they are never written.
    aliases: regex substitutions from older spellings of a file key to the current one.
    twins: (key, other key) under which files have one tensor, once or twice; the other is written.
    """

    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    tied_keys: tuple[tuple[str, str], ...] = ()

    def key(self, path: str) -> str:
        for pattern, replacement in self.renames:
            path = re.sub(pattern, replacement, path)
        *parents, last = path.split("/")
        last = "weight" if last in ("kernel", "scale", "embedding") else last
        return ".".join([*parents, last])

    def canonical(self, key: str) -> str:
        for pattern, replacement in self.aliases:
            key = re.sub(pattern, replacement, key)
        return dict(self.tied_keys).get(key, key)
