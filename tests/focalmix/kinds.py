"""One scan as ten kinds of input, written with SimpleITK."""

import locale
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def write_dicom(folder: Path, image: sitk.Image, uid: str, **changes: Callable) -> Path:
    """Write a DICOM series; stored are HU + 1024, as scanners do.

    Args:
        folder: the folder of the slices.
        image: int16, three-dimensional.
        uid: the series id.
        changes: tag (with ``_`` for ``|``, after a ``t``) -> function of the number and the value
            of a slice, for tags that differ from those of a right series.
    """
    folder.mkdir(parents=True, exist_ok=True)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    process_locale = locale.setlocale(locale.LC_ALL)  # writing tags changes it
    for k in range(image.GetDepth()):
        slice_ = image[:, :, k]
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{k + 1}",
            "0020|000d": f"{uid}.0",
            "0020|000e": uid,
            "0020|0013": str(k),
            "0020|0032": "\\".join(map(str, position)),
            "0020|0037": "\\".join(map(str, direction[:, :2].T.ravel())),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for name, change in changes.items():
            tag = name[1:].replace("_", "|")
            tags[tag] = change(k, tags.get(tag, ""))
        for tag, value in tags.items():
            slice_.SetMetaData(tag, value)
        # names in another order than places
        writer.SetFileName(str(folder / f"IM{(k * 7) % 1000:04d}"))
        writer.SetImageIO("GDCMImageIO")
        writer.Execute(slice_)
    locale.setlocale(locale.LC_ALL, process_locale)
    return folder


def _file(suffix: str, compress: bool = False, **how: object) -> Callable[..., Path]:
    def write(folder: Path, image: sitk.Image, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for function, value in how.items():
            image = getattr(sitk, function)(image, value)
        path = folder / f"{name}{suffix}"
        sitk.WriteImage(image, str(path), useCompression=compress)
        return path

    return write


def _upper_case(folder: Path, image: sitk.Image, name: str) -> Path:
    path = _file(".nii.gz")(folder / "Patients" / name, image, name)
    return path.rename(path.with_name(f"{name}.NII.GZ"))


KINDS: Mapping[str, Callable[[Path, sitk.Image, str], Path]] = {
    "MetaImage": _file(".mhd"),
    "MetaImage, compressed": _file(".mhd", compress=True),
    "MetaImage, one file": _file(".mha"),
    "MetaImage, float": _file(".mha", compress=True, Cast=sitk.sitkFloat64),
    "NIfTI": _file(".nii"),
    "NIfTI, compressed, float": _file(".nii.gz", Cast=sitk.sitkFloat32),
    "NIfTI, RAS, upper case, nested": lambda folder, image, name: _upper_case(
        folder, sitk.DICOMOrient(image, "RAS"), name
    ),
    "NRRD, compressed": _file(".nrrd", compress=True),
    "NRRD, coronal, 32 bit": _file(".nrrd", DICOMOrient="LSA", Cast=sitk.sitkInt32),
    "DICOM": lambda folder, image, name: write_dicom(folder / "study" / name, image, name),
}
"""Kind -> function that writes an image into a folder, and returns the path of the scan."""
