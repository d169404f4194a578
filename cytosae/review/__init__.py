"""What experts say of concepts: the questions, their verdicts, and whether reviewers agree.

Comes in: concepts with their images, and verdicts that the atlas's server receives. Goes out: questions, journals,
tables. Open first: `questions.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
