"""Judges that show two images and ask one question about them."""

from __future__ import annotations

from models.judge import Comparison, Turn
from models.judging.chat_judge import ChatJudge, Question, images_of
from models.judging.readings import Reader
from models.judging.templates import Template
from models.judging.turns import lay_out


class ImagePairJudge(ChatJudge):
    """A judge whose one ``template`` holds the prompt; ``_read`` reads its answer where it is written."""

    template: Template
    _read: Reader

    @property
    def templates(self) -> tuple[Template, ...]:
        return (self.template,)

    def ask(self, comparison: Comparison) -> tuple[Question, ...]:
        parts = lay_out(self.template, images_of(comparison, self.info.name), prompt=comparison.prompt)
        return (Question(Turn(parts, system=self.system), self._read),)
