"""The embedded world: coloured shapes on a grid, told, edited and asked about in natural words.

Endless examples of every task (`examples`), and a reader of pictures with scores (`detect`).
"""

from unipic_jax.data.blocks.captions import GENERATION_KINDS as GENERATION_KINDS
from unipic_jax.data.blocks.captions import Goal as Goal
from unipic_jax.data.blocks.detect import answer_score as answer_score
from unipic_jax.data.blocks.detect import detect as detect
from unipic_jax.data.blocks.detect import edit_score as edit_score
from unipic_jax.data.blocks.detect import generation_score as generation_score
from unipic_jax.data.blocks.edits import EDIT_KINDS as EDIT_KINDS
from unipic_jax.data.blocks.examples import KINDS as KINDS
from unipic_jax.data.blocks.examples import EditGoal as EditGoal
from unipic_jax.data.blocks.examples import Evaluation as Evaluation
from unipic_jax.data.blocks.examples import Sample as Sample
from unipic_jax.data.blocks.examples import Source as Source
from unipic_jax.data.blocks.examples import edit as edit
from unipic_jax.data.blocks.examples import evaluation as evaluation
from unipic_jax.data.blocks.examples import generation as generation
from unipic_jax.data.blocks.examples import question as question
from unipic_jax.data.blocks.examples import sample as sample
from unipic_jax.data.blocks.questions import QUESTION_KINDS as QUESTION_KINDS
from unipic_jax.data.blocks.scenes import Scene as Scene
from unipic_jax.data.blocks.scenes import draw as draw
