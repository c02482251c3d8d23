"""Layouts of public image sets: the folders of their images, labels and masks.

The sets are those of AnomalyCLIP's evaluation (Zhou et al., ICLR 2024; tables 1 and 2). To add a set, add an entry to
`LAYOUTS`. An entry has the layout that the publisher ships. If the preparation scripts of AnomalyCLIP's public code
expect another layout, that layout is the next one in the entry. The first layout that fits a folder is used.
Categories have the names of those scripts, because the names occur in prompts. `zsad.data.public_sets` reads the sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PublicSetName = Literal[
    "mpdd", "btad", "dtd_synthetic", "ksdd", "dagm",
    "isic", "colondb", "clinicdb", "kvasir", "endo", "tn3k",
    "headct", "brainmri", "br35h", "covid19",
]  # fmt: skip
"""Names of the public sets, for the setting `data.layout`."""

MVTEC: Literal["mvtec"] = "mvtec"
"""Layout of MVTec AD, used instead of a `Layout`."""
MVTEC_DESCRIPTION = "CATEGORY/test/good/x.png, test/DEFECT/x.png, ground_truth/DEFECT/x_mask.png"
NEXT_TO_IMAGE = "NEXT_TO_IMAGE"
"""Value of `Layout.masks` for masks in the same folder as their images."""


@dataclass(frozen=True)
class LabelList:
    """Text file with one row per image. Columns are separated by commas or blanks and numbered from 0."""

    file: str
    image_column: int
    """Column of the image's number or file name."""
    anomalous_column: int
    """Column of the label: 0 is normal, 1 is anomalous. Rows with any other value are headings and are skipped."""


@dataclass(frozen=True)
class Layout:
    """Folders and file names of a set.

    Paths and patterns are relative to the folder `test` (or `train`) in the category's folder. Images are the visible
    files that match a pattern and have an image suffix, in upper or lower case.
    """

    description: str
    """Description of the layout in one line, for error messages."""
    defect: str
    """Kind of defect in the anomalous images, in one word."""
    category: str = ""
    """Name of the set's only category. If empty, each folder that matches `categories` is a category of that name."""
    categories: str = ""
    """Pattern of the categories' folders. If empty, the set has one category."""
    base_folders: tuple[str, ...] = (".",)
    """Folders, relative to the root, in which the set may begin. Archives often add a folder or two."""
    test: str = "."
    """Folder of the test images in the category's folder."""
    train: str | None = None
    """Folder of the training images in the category's folder. None: the set has only test images."""
    normal: tuple[str, ...] = ()
    """Patterns of normal images."""
    anomalous: tuple[str, ...] = ()
    """Patterns of anomalous images."""
    mixed: tuple[str, ...] = ()
    """Patterns of images in folders with both kinds. `labels_from` says how they are distinguished."""
    labels_from: Literal["mask", "mask_pixels", "list"] = "mask"
    """Source of the labels of `mixed`. `mask`: an image with a mask is anomalous. `mask_pixels`: an image is anomalous
    if its mask is not black. `list`: the label is in the file `labels`."""
    labels: LabelList | None = None
    """List of labels. With `labels_from` mask it is optional and only says which images must have a mask."""
    masks: str | None = None
    """Folder of the masks, or `NEXT_TO_IMAGE`. None: the set has labels but no masks."""
    mask_suffix: str = ""
    """Text between the image's stem and the suffix in a mask's file name."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of all images."""
        return self.normal + self.anomalous + self.mixed


def _polyp_layout(*base_folders: str) -> Layout:
    """Return the layout of a set in which every image shows a polyp. Images and masks have the same names."""
    return Layout(
        description="images/x.png with masks/x.png",
        defect="polyp",
        category="colon",
        base_folders=(".", *base_folders),
        anomalous=("images/*",),
        masks="masks",
    )


def _brain_layout(*base_folders: str) -> Layout:
    """Return the layout of a set of brain MRI with folders for images with and without a tumour.

    The folders `pred` and `Br35H-Mask-RCNN` of Br35H's archive have no labels and are not read.
    """
    return Layout(
        description="no/x.jpg (normal) and yes/x.jpg (tumour)",
        defect="tumour",
        category="brain",
        base_folders=(".", *base_folders),
        normal=("no/*",),
        anomalous=("yes/*",),
    )


LAYOUTS: dict[PublicSetName, tuple[Layout | Literal["mvtec"], ...]] = {
    "mpdd": (MVTEC,),
    # normal images in test/ok, defects in test/ko, masks with the images' stems in .png or .bmp: mvtec reads all this
    "btad": (MVTEC,),
    "dtd_synthetic": (MVTEC,),
    # 8 pictures each of 50 commutators; the publisher splits commutators into folds, so all images are test images
    "ksdd": (
        Layout(
            description="kos01/Part0.jpg with kos01/Part0_label.bmp, black where normal",
            defect="crack",
            category="electrical commutators",
            base_folders=(".", "KolektorSDD"),
            mixed=("kos*/*",),
            labels_from="mask_pixels",
            masks=NEXT_TO_IMAGE,
            mask_suffix="_label",
        ),
        MVTEC,  # as in the public code of AnomalyCLIP
    ),
    # Label/ has a mask for each defect, and Labels.txt with the columns: number, 0 or 1, image, a number, mask.
    # The columns are known only from other programs, so the list is only used to find missing masks
    "dagm": (
        Layout(
            description="Class1/Test/0001.PNG, with Class1/Test/Label/0001_label.PNG if defective; normal: Train",
            defect="defect",
            categories="Class*",
            base_folders=(".", "DAGM_KaggleUpload"),
            test="Test",
            train="Train",
            mixed=("*",),
            labels_from="mask",
            labels=LabelList("Label/Labels.txt", image_column=2, anomalous_column=1),
            masks="Label",
            mask_suffix="_label",
        ),
    ),
    # ISIC 2016, part 1, test data (379 images): two archives, unpacked into one folder
    "isic": (
        Layout(
            description="ISBI2016_ISIC_Part1_Test_Data/x.jpg, ISBI2016_ISIC_Part1_Test_GroundTruth/x_Segmentation.png",
            defect="lesion",
            category="skin",
            anomalous=("ISBI2016_ISIC_Part1_Test_Data/*",),
            masks="ISBI2016_ISIC_Part1_Test_GroundTruth",
            mask_suffix="_Segmentation",
        ),
        Layout(  # as in the public code of AnomalyCLIP
            description="skin/test/FOLDER/x.jpg with skin/ISBI2016_ISIC_Part1_Test_GroundTruth/x_Segmentation.png",
            defect="lesion",
            category="skin",
            base_folders=("skin", "."),
            anomalous=("test/*/*",),
            masks="ISBI2016_ISIC_Part1_Test_GroundTruth",
            mask_suffix="_Segmentation",
        ),
    ),
    # from the collection of polyp sets (figshare 21221579); all files are PNG
    "colondb": (_polyp_layout("CVC-ColonDB"),),
    "clinicdb": (
        _polyp_layout("CVC-ClinicDB"),
        Layout(  # the publisher's archive: TIFF with copies in PNG; if both exist, PNG is read
            description="Original/1.tif with Ground Truth/1.tif, in PNG/ or TIF/ if there",
            defect="polyp",
            category="colon",
            base_folders=("PNG", "TIF", ".", "CVC-ClinicDB/PNG", "CVC-ClinicDB/TIF", "CVC-ClinicDB"),
            anomalous=("Original/*",),
            masks="Ground Truth",
        ),
    ),
    # The AnomalyCLIP paper tests the 100 images of the polyp collection. Kvasir-SEG itself has 1,000, with images and
    # masks in JPEG
    "kvasir": (_polyp_layout("Kvasir", "Kvasir-SEG"),),
    # the test set for segmentation of EndoTect 2020, in JPEG
    "endo": (_polyp_layout("EndoTect_2020_Segmentation_Test_Dataset"),),
    # test-mask/ is also JPEG; trainval-image/ is not read, because it has no normal images
    "tn3k": (
        Layout(
            description="test-image/0000.jpg with test-mask/0000.jpg",
            defect="nodule",
            category="thyroid",
            base_folders=(".", "tn3k", "Thyroid Dataset/tn3k"),
            anomalous=("test-image/*",),
            masks="test-mask",
        ),
    ),
    "headct": (
        Layout(
            description="head_ct/head_ct/000.png with labels.csv (id, hemorrhage)",
            defect="haemorrhage",
            category="brain",
            base_folders=(".", "head_ct"),
            mixed=("head_ct/head_ct/*", "head_ct/*"),
            labels_from="list",
            labels=LabelList("labels.csv", image_column=0, anomalous_column=1),
        ),
        MVTEC,  # as in the public code of AnomalyCLIP: brain/test/good and others
    ),
    # the archive contains everything twice, once in brain_tumor_dataset/; only one copy is read
    "brainmri": (_brain_layout("brain_tumor_dataset"),),
    "br35h": (_brain_layout(),),
    # COVID-19 against normal. Lung opacities and viral pneumonias are left out, and the set's masks show lungs.
    # Releases differ. The newest has COVID/images and Normal/images (3,616 + 10,192 images). The first had COVID-19 and
    # NORMAL without images/ (219 + 1,341). The AnomalyCLIP paper must have used the first, without pneumonias: it
    # reports an AP of 8.5 % (table 2). If a fourth of the images were anomalous, even the worst ranking would have a
    # higher AP
    "covid19": (
        Layout(
            description="Normal/images/x.png and COVID/images/x.png, or NORMAL/x.png and COVID/x.png or COVID-19/x.png",
            defect="covid",
            category="chest",
            base_folders=(".", "COVID-19_Radiography_Dataset", "COVID-19 Radiography Database"),
            normal=("Normal/images/*", "NORMAL/*"),
            anomalous=("COVID/images/*", "COVID/*", "COVID-19/*"),
        ),
    ),
}


def describe_layouts(name: PublicSetName) -> str:
    """Return a description of all layouts of a set, in one line."""
    return "; or ".join(MVTEC_DESCRIPTION if layout == MVTEC else layout.description for layout in LAYOUTS[name])
