"""The agent: the scaffold that runs inside a guest beside a model server.

Standard library only, Python 3.11, and nothing imported from the appliance: the folder is copied into
guests as it is. What it does is deliberately no more than arXiv 2412.12140 describes; it is the thing
that is measured, and everything it says is recorded by the host as a claim.
"""

from typing import Final

__version__: Final = "0.1.0"
NAME: Final = "hotcell"
