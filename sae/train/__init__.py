"""Training: many SAEs from one pass over the store, or one on rows in memory.

The package is callable: `sae.train(...)` is `sae.api.train(...)`. Importing any module of it makes `sae.train` this
package, whatever stood there before.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from sae.api import train

        return train(*arguments, **named)


sys.modules[__name__].__class__ = _CallablePackage
