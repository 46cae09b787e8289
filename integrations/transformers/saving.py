def save_sub_nets(ast, folder, *, elastic=True):
    if elastic:
        ast.save(f"{folder}/elastic.safetensors")


def write_card(ast, folder): ...
def export_pretrained(*a): ...
