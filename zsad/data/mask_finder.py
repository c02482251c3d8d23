"""Find the masks of a category's anomalous images in its folder of masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from zsad.data.listing import FoundImage, folders_in
from zsad.data.masks import MaskFolder


def find_masks(images: Sequence[FoundImage], test: Path, masks: Path | None) -> Iterator[FoundImage]:
    """Find the mask of each image that has none yet. An image without its mask gets a rule, if there are masks at all.

    The mask is in the folder of masks with the label's name and, below it, in the same folders as the image. If such a
    folder does not exist, the masks of all labels are searched: those that lie directly in the folder of masks, and
    those in its folders that have no label's name. The stem must then be unique.

    Parameters
    ----------
    images
        Anomalous images of all labels.
    test
        Folder of the labels.
    masks
        Folder of the masks. None: only masks beside images are used.
    """
    if masks is None:
        inner = {image.defect for image in images if image.mask is not None}
        for image in images:
            missing = image.mask is None and image.defect in inner
            rule = f"anomalous, but without a mask: no {image.path.stem}_mask.png beside it" if missing else None
            yield replace(image, rule=rule)
        return
    finder = _Finder(images, test, masks)
    for image in images:
        yield image if image.mask is not None else finder.with_mask(image)


@dataclass
class _Place:
    """Folder in which masks are searched, and how many images with a stem it serves."""

    name: str
    masks: MaskFolder
    stems: Counter[str]


@dataclass
class _Finder:
    images: Sequence[FoundImage]
    test: Path
    masks: Path
    places: dict[Path, _Place] = field(default_factory=dict)

    def with_mask(self, image: FoundImage) -> FoundImage:
        stem = image.path.stem
        place = self._place_of(image)
        found = place.masks.find(stem)
        if not found:
            rule = f"anomalous, but without a mask: no {stem}[_mask].png in {place.name}/"
            example = place.masks.example(stem)
            return replace(image, rule=rule + (f", which holds {example}" if example else ""))
        if len(found) > 1:
            names = " and ".join(sorted(path.name for path in found))
            return replace(image, rule=f"two masks of one name: {names}")
        if place.stems[stem.lower()] > 1:
            rule = f"ambiguous mask: {found[0].name} could be another image's of the same name"
            return replace(image, rule=rule)
        return replace(image, mask=found[0])

    def _place_of(self, image: FoundImage) -> _Place:
        """Return the innermost existing folder of masks for an image."""
        folder = self._folder_of(image)
        if folder not in self.places:
            self.places[folder] = self._open(folder)
        return self.places[folder]

    def _open(self, folder: Path) -> _Place:
        served = [image.path.stem.lower() for image in self.images if self._folder_of(image) == folder]
        folders = [folder]
        if folder == self.masks:
            labels = {each.name for each in folders_in(self.test)}
            own = set(served)
            folders += [each for each in folders_in(folder) if each.name not in labels and each.name.lower() not in own]
        return _Place(folder.name, MaskFolder(folders, served), Counter(served))

    def _folder_of(self, image: FoundImage) -> Path:
        own = (self.masks / image.path.relative_to(self.test)).parent
        return next((each for each in (own, self.masks / image.defect) if each.is_dir()), self.masks)
