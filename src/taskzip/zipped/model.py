"""The joint network as users have it: with its summary, its files and its place on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from taskzip.zipped.checkpoint import read, save
from taskzip.zipped.hub import push_to_hub, read_pretrained, save_pretrained
from taskzip.zipped.network import JointNetwork
from taskzip.zipped.summary import summary_table


class ZippedModel(JointNetwork):
    """One network for several tasks. `zipped["name"]` stands wherever that task's original network stood.

    A block that several tasks share is one `Parameter`, tied like any tied weight in torch: `parameters()` gives it
    once, gradients of all tasks add up in it, and `.to(...)`, `state_dict()`, `train()`, `eval()` and `copy.deepcopy`
    work as ever.
    """

    def summary(self) -> str:
        """Tables for people, at most 100 columns.

        Per layer: units, shared units, what sharing them cost in percent of the variance of the layer's outputs,
        parameters before and after; for three or more tasks, which of them share. For each task's network as it was
        given, for all of these apart, and together: FLOPs of one sample's forward pass (a multiply-add is 2, as
        `torch.utils.flop_counter` counts), which were counted on the calibration data when the networks were zipped,
        and bytes of parameters and buffers.
        """
        return summary_table(self)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with every block once; see `taskzip.load`.

        Raises:
            CheckpointError: the file cannot be written; nothing is left behind.
        """
        save(self, path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in the way of the Hugging Face Hub; see `taskzip.from_pretrained`.

        It holds `model.safetensors` (what `save` writes), `config.json` and `README.md`, a model card that says what
        was merged, from what, how, and what `taskzip.measure` found. Written again, all three are replaced.

        Raises:
            CheckpointError: the folder cannot be written, or has files of these names that this did not write; what
                stood there before still stands.
        """
        save_pretrained(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a network zipped by taskzip",
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub, as one commit. Needs taskzip[hub].

        Args:
            repo_id: "owner/name"; the repository is made if there is none.
            private: whether a new repository is private; default as the owner's settings say.
            token: default the one that `hf auth login` keeps.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: huggingface_hub is not installed, or the Hub cannot be reached or refuses.
        """
        return push_to_hub(self, repo_id, private=private, token=token, commit_message=commit_message)


def load(path: str | Path, networks: Mapping[str, nn.Module]) -> ZippedModel:
    """Read a joint network from a file.

    Args:
        path: a file that `ZippedModel.save` wrote.
        networks: per task name, a fresh network of the original class. It is read for its structure only and not
            changed; the joint network lies on its device.

    Returns:
        The joint network in eval mode, with outputs bit-identical to those of the saved one.

    Raises:
        CheckpointError: a file that is absent, torn, foreign or of a later format, or networks that do not fit it.
    """
    return read(ZippedModel, path, networks)


def from_pretrained(
    folder_or_repo: str | Path,
    models: Mapping[str, nn.Module],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> JointNetwork:
    """Read a joint network from a folder, or download it from the Hugging Face Hub.

    Args:
        folder_or_repo: a folder that `save_pretrained` wrote, for which nothing needs to be installed and no network is
            needed; or, where there is no such folder, a repository "owner/name" on the Hub, which is kept in
            huggingface_hub's cache.
        models: per task name, a fresh network of the original class; see `taskzip.load`.
        revision: of the repository: a branch, a tag or a commit.
        token: for private repositories; default the one that `hf auth login` keeps.

    Returns:
        The joint network in eval mode, with outputs bit-identical to those of the saved one.

    Raises:
        CheckpointError: a folder that is absent, torn, or of something else, a repository that cannot be downloaded, or
            networks that do not fit; or huggingface_hub is needed and not installed.
    """
    return read_pretrained(ZippedModel, folder_or_repo, models, revision=revision, token=token)
