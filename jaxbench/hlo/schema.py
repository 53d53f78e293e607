"""The few fields of XLA's HLO protos that we read, as a schema of our own.

A proto on the wire is field numbers and values; names and packages are not in it, and fields that
the schema does not know are skipped. So the table below is enough, works across XLA versions, and
cannot clash with another package's copy of XLA's protos. Fields of type `raw` hold a message that
is decoded only where it is needed.

Source of the field numbers: openxla/xla, `xla/service/hlo.proto` and `xla/xla_data.proto`. Fields
92 and 93 of an instruction (iota and mesh-axes replica groups) are newer than most published
copies.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

PACKAGE = "jaxbench.hlo"


class HloReadError(ValueError):
    """The bytes are not a serialized HLO module, or one whose parts do not fit together."""


_SCHEMA = """
Tile: dimensions=1*int64
Layout: minor_to_major=1*int64 tiles=6*Tile element_size_in_bits=7:int64 memory_space=8:int64
Shape: element_type=2:int32 dimensions=3*int64 tuple_shapes=4*Shape layout=5:Layout
Metadata: op_name=2:string
Literal: preds=2*bool s8s=15:bytes u8s=3:bytes s32s=4*int32 s64s=5*int64 u32s=6*uint32 u64s=7*uint64
WindowDimension: size=1:int64 stride=2:int64 padding_low=3:int64 padding_high=4:int64 \
    window_dilation=5:int64 base_dilation=6:int64 window_reversal=7:bool
Window: dimensions=1*WindowDimension
ConvolutionDims: kernel_input_feature=3:int64 kernel_output_feature=4:int64 kernel_spatial=6*int64 \
    input_batch=7:int64 input_feature=8:int64 input_spatial=11*int64 \
    output_batch=9:int64 output_feature=10:int64 output_spatial=12*int64
DotDims: lhs_contracting=1*int64 rhs_contracting=2*int64 lhs_batch=3*int64 rhs_batch=4*int64
RaggedDotDims: dot=1:DotDims lhs_ragged=2*int64 rhs_group=3*int64
SliceDimension: start=1:int64 limit=2:int64 stride=3:int64
ReplicaGroup: replica_ids=1*int64
IotaGroups: num_groups=1:int64 group_size=2:int64 reshape_dims=3*int64 transpose_perm=4*int32
DeviceList: groups=1*ReplicaGroup iota=2:IotaGroups
MeshAxis: name=1:string size=2:int64
Mesh: axes=1*MeshAxis device_ids=2*int64
SubAxis: pre_size=1:int64 size=2:int64
AxisRef: index=1:int64 sub_axis=2:SubAxis
MeshGroups: mesh=1:Mesh axes=2*AxisRef
SourceTarget: source=1:int64 target=2:int64
OperandAlias: output_index=1*int64 operand=2:int64 operand_index=3*int64
Attribute: key=1:string value=2:string
Attributes: map=1*Attribute
Instruction: name=1:string opcode=2:string shape=3:raw metadata=7:Metadata literal=8:raw \
    parameter_number=9:int64 fusion_kind=11:string tuple_index=13:int64 dimensions=14*int64 \
    window=15:Window convolution=16:ConvolutionDims slice_dimensions=17*SliceDimension \
    dynamic_slice_sizes=20*int64 channel_id=26:int64 custom_call_target=28:string dot=30:DotDims \
    fft_length=32*int64 gather_slice_sizes=34*int64 id=35:int64 operand_ids=36*int64 \
    control_predecessor_ids=37*int64 called_computation_ids=38*int64 backend_config=43:bytes \
    is_host_transfer=47:bool replica_groups=49*ReplicaGroup feature_group_count=50:int64 \
    source_target_pairs=52*SourceTarget batch_group_count=58:int64 comparison_direction=63:string \
    frontend_attributes=68:Attributes output_operand_aliasing=74*OperandAlias \
    async_execution_thread=79:string device_list=87:DeviceList ragged_dot=90:RaggedDotDims \
    iota_groups=92:IotaGroups mesh_groups=93:MeshGroups
Computation: name=1:string instructions=2*Instruction id=5:int64 root_id=6:int64 \
    is_fusion=7:bool execution_thread=8:string
InstructionSequence: instruction_ids=1*int64
ScheduleEntry: computation_id=1:int64 sequence=2:InstructionSequence
Schedule: sequences=1*ScheduleEntry
AliasEntry: output_index=1*int64 parameter_number=2:int64 parameter_index=3*int64
InputOutputAlias: entries=1*AliasEntry
Module: name=1:string computations=3*Computation id=5:int64 entry_computation_id=6:int64 \
    schedule=7:Schedule input_output_alias=8:InputOutputAlias stack_frames=17:raw \
    frontend_attributes=19:raw
"""


def _field_proto(text: str, package: str) -> descriptor_pb2.FieldDescriptorProto:
    """One field from `name=number:type`, or `name=number*type` if it repeats."""
    repeated = "*" in text
    name, rest = text.split("=")
    number, kind = rest.split("*" if repeated else ":")
    proto = descriptor_pb2.FieldDescriptorProto
    field = proto(name=name, number=int(number))
    field.label = proto.LABEL_REPEATED if repeated else proto.LABEL_OPTIONAL
    if kind[0].isupper():
        field.type, field.type_name = proto.TYPE_MESSAGE, f".{package}.{kind}"
    else:
        field.type = proto.Type.Value("TYPE_BYTES" if kind == "raw" else f"TYPE_{kind.upper()}")
    return field


def build_classes(schema: str, package: str) -> dict[str, Any]:
    """Returns message classes by name, in a pool of their own, from lines `Name: field field`."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package)
    file.syntax = "proto3"
    for line in schema.strip().splitlines():
        name, fields = line.split(":", 1)
        message_type = file.message_type.add(name=name)
        message_type.field.extend(_field_proto(field, package) for field in fields.split())
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    names = [message_type.name for message_type in file.message_type]
    find = pool.FindMessageTypeByName
    return {n: message_factory.GetMessageClass(find(f"{package}.{n}")) for n in names}


_CLASSES = build_classes(_SCHEMA, PACKAGE)


def decode(name: str, data: bytes) -> Any:
    """Decodes `data` as the message `name` of the table above.

    Raises:
      HloReadError: if the bytes are no such message.
    """
    try:
        return _CLASSES[name].FromString(data)
    except message.DecodeError as error:
        raise HloReadError(
            f"{len(data)} bytes do not decode as an HLO {name}: {error}. Pass the result of "
            "`as_serialized_hlo_module_proto()`."
        ) from error
